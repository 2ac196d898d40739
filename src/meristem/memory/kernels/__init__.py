"""Forms whose gradients are written out, because autograd's graph would be most of their cost."""
