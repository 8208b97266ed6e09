from .adapters import LinenNetwork as LinenNetwork
from .adapters import NNXNetwork as NNXNetwork
from .combine import at as at
from .combine import classifier_guided as classifier_guided
from .combine import difference as difference
from .combine import gap as gap
from .combine import guided as guided
from .conformance import ScoreReport as ScoreReport
from .conformance import check_score as check_score
from .model import Model as Model
from .prediction import EDMPreconditioned as EDMPreconditioned
from .prediction import PredictionScore as PredictionScore
from .prediction import from_prediction as from_prediction
from .sampling import ddim as ddim
from .sampling import heun as heun
from .sampling import noise_levels as noise_levels
from .sampling import sample as sample
from .schedule import ContinuousVP as ContinuousVP
from .schedule import DiscreteVP as DiscreteVP
from .schedule import FlowMatching as FlowMatching
from .schedule import Schedule as Schedule
from .schedule import SubVP as SubVP
from .schedule import VarianceExploding as VarianceExploding
from .schedule import schedule_from_config as schedule_from_config

__all__ = [
    "ContinuousVP",
    "DiscreteVP",
    "EDMPreconditioned",
    "FlowMatching",
    "LinenNetwork",
    "Model",
    "NNXNetwork",
    "PredictionScore",
    "Schedule",
    "ScoreReport",
    "SubVP",
    "VarianceExploding",
    "at",
    "check_score",
    "classifier_guided",
    "ddim",
    "difference",
    "from_prediction",
    "gap",
    "guided",
    "heun",
    "noise_levels",
    "sample",
    "schedule_from_config",
]
