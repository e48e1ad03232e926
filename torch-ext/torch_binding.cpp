// The Python module of a build for the Hugging Face hub. Its import registers the operators of csrc/. The builder
// writes registration.h.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
