from .build import build_report as build_report

__all__ = ["build_report"]
