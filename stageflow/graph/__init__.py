"""What is proven before anything runs: that the stages make a DAG, and into which branches it falls."""

from stageflow.graph.branches import Branch, find_branches
from stageflow.graph.graph import Graph
from stageflow.graph.plan import Edge, Plan, Shape, Special, armed, limit_on, with_edges

__all__ = ["Branch", "Edge", "Graph", "Plan", "Shape", "Special", "armed", "find_branches", "limit_on", "with_edges"]
