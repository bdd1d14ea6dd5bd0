"For all tests: full float32 on a GPU too, where TF32 would round the references of the comparisons."
import torch

torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
