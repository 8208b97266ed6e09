from .loop import train as train
from .testbeds import GradedTestbed as GradedTestbed
from .testbeds import PromptsTestbed as PromptsTestbed
from .testbeds import graded_testbed as graded_testbed
from .testbeds import prompts_testbed as prompts_testbed

__all__ = [
    "GradedTestbed",
    "PromptsTestbed",
    "graded_testbed",
    "prompts_testbed",
    "train",
]
