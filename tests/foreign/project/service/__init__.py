"""The shop's own package of this name."""

BOX_SIZE = 2
