// Autograd and the Python module, compiled as one file, as units/ops.cpp is.
#include "autograd/activation.cpp"
#include "autograd/batch_norm_act.cpp"
#include "autograd/clip_grad.cpp"
#include "module.cpp"
