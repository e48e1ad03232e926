// The namespace of the operators: torch.ops.gradkernels. A build for the Hugging Face hub (build.toml) names another one, so
// that one process can load several of them.
#pragma once

#include <torch/library.h>

#if defined(TORCH_EXTENSION_NAME)
#define GK_NAMESPACE TORCH_EXTENSION_NAME
#else
#define GK_NAMESPACE gradkernels
#endif

// TORCH_LIBRARY makes a name of its first argument as it stands, so GK_NAMESPACE must be expanded first.
#define GK_LIBRARY_OF(name, m) TORCH_LIBRARY(name, m)
#define GK_LIBRARY_IMPL_OF(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)
#define GK_QUOTE_OF(name) #name

#define GK_LIBRARY(m) GK_LIBRARY_OF(GK_NAMESPACE, m)
#define GK_LIBRARY_IMPL(key, m) GK_LIBRARY_IMPL_OF(GK_NAMESPACE, key, m)
#define GK_QUOTE(name) GK_QUOTE_OF(name)
