"""The demonstration: a made-up fortnight that ends in a bad night, for pictures and for trying it
out.
"""
