"""Operators that hold tensors in fewer bytes between forward and backward, and the codecs made of them."""
