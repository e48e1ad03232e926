"""Which layer vanishes or explodes, and what to do: diagnose and GradientMonitor.

probe.py looks at one step, with backward_graph.py for what a gradient passes; verdicts.py judges its layers; cures.py says what to change;
diagnose.py is the public call and its report, command.py its command line. monitor.py records a training. plots.py draws for both.
"""
