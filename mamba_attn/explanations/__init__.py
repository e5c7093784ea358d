"""What ``mamba-attn explain`` does: from an image file to a page, a picture and arrays about it."""
