"""What is proven before anything runs: that the stages make a DAG, and into which branches it falls."""

from stageflow.graph.branches import Branch, find_branches
from stageflow.graph.graph import Graph, Shape

__all__ = ["Branch", "Graph", "Shape", "find_branches"]
