from .plan import Calibration as Calibration
from .result import AuditResult as AuditResult
from .run import audit as audit

__all__ = ["AuditResult", "Calibration", "audit"]
