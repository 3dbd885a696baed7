"""TCAN: a person in one image, animated with the motion of a video (arXiv 2407.09012), on diffusers."""

__version__ = "0.1.0"
