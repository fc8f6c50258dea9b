// Stands in for CUDA's header of this name where g++ compiles the kernels for the CPU.
#pragma once
#include "emulator/keywords.h"
#include "emulator/vectors.h"
//
#include "emulator/intrinsics.h"
#include "emulator/runtime.h"
#include "emulator/threads.h"
