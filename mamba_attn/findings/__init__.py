"""The findings of arXiv 2502.20764, measured: on a trained model, on random weights, in other patch orders."""
