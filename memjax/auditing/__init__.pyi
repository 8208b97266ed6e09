from .run import audit as audit
from .plan import Calibration as Calibration
from .result import AuditResult as AuditResult

__all__ = ["AuditResult", "Calibration", "audit"]
