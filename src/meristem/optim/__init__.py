"""The outer optimizer: which parameters it decays, how its rate moves, what of it must be saved."""
