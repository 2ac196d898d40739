"""Many runs that differ in some keys: which they are, how they are made, and what they came to."""
