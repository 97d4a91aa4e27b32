"""Names of what a run writes into its folder besides checkpoints; who writes them and who reads them agree here."""

METRICS, SAMPLES = "metrics.jsonl", "samples"
"""Every metric of every step, and the rationales and rewards of some of its samples."""
RECORD = "run.json"
"""What was started: command, configuration, versions."""
REPORT = "report.html"
DIAGNOSTICS, PROBE = "diagnostics", "probe.json"
"""What the probe texts' rationales and vectors became over the steps, and the texts themselves."""
