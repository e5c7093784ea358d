"""Statistics of attention over many images, and what they look like: for people who compare blocks, orders, models.

Imported on demand only.
"""
