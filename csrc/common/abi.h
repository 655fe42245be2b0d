// Names of torch's stable ABI that its older releases spell otherwise.
#pragma once

#include <torch/csrc/stable/library.h>

// torch 2.10 to 2.12 have this check under its older name alone
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
