"""Maps exactly as published code computes them, where that differs from the equations of its paper.

Each convention names the repository it follows; ``docs/how_it_works.md`` lists the differences.
"""
