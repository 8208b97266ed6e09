from .adapters import LinenNetwork as LinenNetwork
from .adapters import NNXNetwork as NNXNetwork
from .classifier import NoisyClassifier as NoisyClassifier
from .combine import at as at
from .combine import classifier_guided as classifier_guided
from .combine import difference as difference
from .combine import gap as gap
from .combine import guided as guided
from .conformance import ScoreReport as ScoreReport
from .conformance import check_score as check_score
from .edges import EdgeGrowth as EdgeGrowth
from .edges import volume_growth_edges as volume_growth_edges
from .flow import Flow as Flow
from .flow import FlowPath as FlowPath
from .flow import FlowProfile as FlowProfile
from .flow import ProbabilityFlow as ProbabilityFlow
from .flow import probability_flow as probability_flow
from .implicit import implicit_classifier as implicit_classifier
from .likelihood import LogLikelihood as LogLikelihood
from .likelihood import LogLikelihoodRatio as LogLikelihoodRatio
from .likelihood import bits_per_dim as bits_per_dim
from .likelihood import log_likelihood as log_likelihood
from .likelihood import log_likelihood_ratio as log_likelihood_ratio
from .model import Model as Model
from .model import Origin as Origin
from .model import from_callable as from_callable
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
from .volume import FrameGrowth as FrameGrowth
from .volume import TopGrowth as TopGrowth
from .volume import VolumeGrowth as VolumeGrowth
from .volume import volume_growth as volume_growth
from .volume import volume_growth_frame as volume_growth_frame
from .volume import volume_growth_top as volume_growth_top

__all__ = [
    "ContinuousVP",
    "DiscreteVP",
    "EDMPreconditioned",
    "EdgeGrowth",
    "Flow",
    "FlowMatching",
    "FlowPath",
    "FlowProfile",
    "FrameGrowth",
    "LinenNetwork",
    "LogLikelihood",
    "LogLikelihoodRatio",
    "Model",
    "NNXNetwork",
    "NoisyClassifier",
    "Origin",
    "PredictionScore",
    "ProbabilityFlow",
    "Schedule",
    "ScoreReport",
    "SubVP",
    "TopGrowth",
    "VarianceExploding",
    "VolumeGrowth",
    "at",
    "bits_per_dim",
    "check_score",
    "classifier_guided",
    "ddim",
    "difference",
    "from_callable",
    "from_prediction",
    "gap",
    "guided",
    "heun",
    "implicit_classifier",
    "log_likelihood",
    "log_likelihood_ratio",
    "noise_levels",
    "probability_flow",
    "sample",
    "schedule_from_config",
    "volume_growth",
    "volume_growth_edges",
    "volume_growth_frame",
    "volume_growth_top",
]
