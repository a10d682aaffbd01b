// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "stable_abi.h"
