// Drawing of tokens for any processor.
#include "sampling.h"
TANDEM_SAMPLING_FUNCTIONS(fma_portable)
