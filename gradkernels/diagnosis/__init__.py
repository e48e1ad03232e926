"""diagnose and GradientMonitor: which layer vanishes or explodes, and what to do.

diagnose.py is the public call and its report, and command.py its command line. probe.py observes one step:
nonfinite.py follows nan and inf in it, backward_graph.py says which layers a gradient passes, and recurrent.py
what happens between time steps. verdicts.py judges the layers with the thresholds of thresholds.py, and
cures.py says what to change.

monitor.py (GradientMonitor) reports a training. recorder.py records it in hooks of optimizers,
forward_hooks.py in hooks of modules, deferred.py keeps the numbers on their device, and watch.py raises the
alarms. plots.py draws for both.
"""

from gradkernels.diagnosis import diagnose, monitor

__all__ = ["diagnose", "monitor"]
