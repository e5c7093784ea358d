"""Behind ``mamba-attn explain``: turns an image file into a page, a picture and arrays."""
