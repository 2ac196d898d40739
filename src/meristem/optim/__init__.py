"""The outer optimizer: which parameters it decays, how its learning rate moves, what of it must be saved."""
