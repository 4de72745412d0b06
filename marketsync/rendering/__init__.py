"""Renderings of `marketsync.report.RunReport`: one module a medium, all of the same model and in the same words."""
