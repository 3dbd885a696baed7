"""TCAN: animate the person in one image with the motion of a video (arXiv 2407.09012), built on diffusers."""

__version__ = "0.1.0"
