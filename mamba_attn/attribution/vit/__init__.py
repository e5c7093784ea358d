"""Methods for softmax attention: a vision transformer's maps, computed on the same records as a Mamba's."""
