from .data import DataMitigation as DataMitigation
from .data import Fitted as Fitted
from .data import Outcome as Outcome
from .data import fitted_model as fitted_model
from .data import heldout_loss as heldout_loss
from .data import mitigate_data as mitigate_data
from .data import retrain as retrain
from .data import shift as shift
from .initial_noise import SailResult as SailResult
from .initial_noise import sail as sail
from .objectives import Means as Means
from .objectives import NoiseObjective as NoiseObjective
from .objectives import condition_means as condition_means
from .objectives import judge_cost as judge_cost
from .objectives import judge_noises as judge_noises
from .prompt import PromptResult as PromptResult
from .prompt import embed_conditions as embed_conditions
from .prompt import optimize_prompts as optimize_prompts

__all__ = [
    "DataMitigation",
    "Fitted",
    "Means",
    "NoiseObjective",
    "Outcome",
    "PromptResult",
    "SailResult",
    "condition_means",
    "embed_conditions",
    "fitted_model",
    "heldout_loss",
    "judge_cost",
    "judge_noises",
    "mitigate_data",
    "optimize_prompts",
    "retrain",
    "sail",
    "shift",
]
