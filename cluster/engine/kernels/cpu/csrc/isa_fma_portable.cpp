// Class fma for any processor, with whatever the compiler makes of it.
#define TANDEM_ISA tandem_fma_portable
#include "exports.h"
