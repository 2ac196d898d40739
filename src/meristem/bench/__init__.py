"""Measurements that compare, in one run, on this machine."""
