"""What is worth writing out by hand: gradients that autograd would make dearer, and kernels where a device has them."""
