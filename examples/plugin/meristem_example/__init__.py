"""What a plug-in of meristem looks like: one module for each thing, found through the entry points of the package."""
