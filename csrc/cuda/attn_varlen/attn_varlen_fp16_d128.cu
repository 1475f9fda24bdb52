#include "cuda/attn_varlen/instance.cuh"

template void filbert::cuda::launch_attn_varlen<filbert::cuda::fp16, 128>(const AttnVarlenArgs&,
                                                                          const LaunchPlan&,
                                                                          Stream);
