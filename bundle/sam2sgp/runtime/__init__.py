"""Exported graphs of the network, and what runs them in its place."""

from sam2sgp.runtime.execution import RUNTIMES, GraphNetwork, GraphRuntime
from sam2sgp.runtime.export import export_graphs, graphs_folder

__all__ = ["RUNTIMES", "GraphNetwork", "GraphRuntime", "export_graphs", "graphs_folder"]
