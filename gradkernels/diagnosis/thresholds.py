"""Every threshold of a verdict of diagnose, with its reason. verdicts.py and probe.py compare with them.

After a change, adapt the table in the docstring of diagnose (a decimal or a fraction, not per cent), the table
in docs/guide/diagnose.md, and the tests on both sides of a threshold (tests/test_diagnose.py).
"""

# vanishing: the gradient of a layer is below this share of the largest gradient closer to the loss. With one
# learning rate for all layers it then needs 1,000 steps for one step of that layer.
VANISHING_SHARE = 1e-3
# Also vanishing: the gradient is below this share of the weight. float32 loses such an update even with a
# learning rate of 1.
VANISHING_RATIO = 1e-7
# Not vanishing: layers of a residual branch whose last factors are at most this large. Such a branch starts
# as almost nothing and opens as it learns. The factors are 0 in Goyal et al., "Accurate, Large Minibatch
# SGD", 2017, and 1e-6 to 1e-4 in Touvron et al., "Going deeper with Image Transformers", 2021.
NEAR_ZERO = 1e-3

# exploding: the gradient is more than this many times the weight. A step with a learning rate of 0.01 then
# overwrites the weight.
EXPLODING_RATIO = 100.0
# Also exploding: the gradient is more than this many times that of the output layer that it came through. If
# it came through several, the one with the largest gradient counts.
EXPLODING_SHARE = 1e3

# dead: more than this share of the units of a relu are off for every sample. Deep relu networks lose up to
# 60 % of their units by chance.
DEAD_SHARE = 2 / 3
# A smaller number of values per unit is not judged. A unit that is off for half of all inputs is off for all
# of 16 inputs once in 2^16 times.
MIN_SAMPLES = 16

# saturated: more than this share of the outputs of an activation lie on a flat part.
SATURATED_SHARE = 0.5
# A part of an activation is flat if its slope is below this share of the steepest slope.
FLAT_SLOPE = 0.1

# badly initialised: a weight multiplies the size of the signal on the way forward, and that of the gradient
# on the way back, by less than MIN_SCALE or by more than MAX_SCALE. A factor of 1 keeps the size. A weight is
# bad only if both factors are, because every known scheme keeps at least one of the sizes: He and LeCun one
# of them, Xavier both if that is possible. torch's default keeps 0.31 (sigmoid) to 0.58 of the signal.
MIN_SCALE, MAX_SCALE = 0.25, 2.5

# BN with tiny batch: batch statistics of fewer samples, or of fewer values per channel, are noise (Wu, He,
# "Group Normalization", 2018, figure 1).
MIN_BATCH, MIN_VALUES_PER_CHANNEL = 4, 16
