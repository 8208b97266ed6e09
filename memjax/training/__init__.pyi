from .classifier import ClassifierReport as ClassifierReport
from .classifier import TrainedClassifier as TrainedClassifier
from .classifier import train_classifier as train_classifier
from .continued import continue_training as continue_training
from .loop import train as train
from .lora import fine_tune as fine_tune
from .testbeds import GradedTestbed as GradedTestbed
from .testbeds import PromptsTestbed as PromptsTestbed
from .testbeds import graded_testbed as graded_testbed
from .testbeds import prompts_testbed as prompts_testbed

__all__ = [
    "ClassifierReport",
    "GradedTestbed",
    "PromptsTestbed",
    "TrainedClassifier",
    "continue_training",
    "fine_tune",
    "graded_testbed",
    "prompts_testbed",
    "train",
    "train_classifier",
]
