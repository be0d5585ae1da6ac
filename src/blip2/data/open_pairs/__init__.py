"""The embedded training set: real pictures with real texts out of registry packages, and scenes composed from them."""
