"""Devices and processes: the mesh, how arrays are split over it, where they are placed, processes that train together.

May import model, cli, settings and errors; `mesh` and `processes` import no jax before they need it.
"""
