"""Geometry of charts: where bars, cells and labels stand. It renders nothing and asks no
operation.
"""
