# CLIP-Adapter, CLIP's RN50, 16 shots, on cached features. The data set is ImageNet, or
# another one by --cfg-options task=eurosat.
_base_ = '_base_/clip-adapter.py'

task = '{{$DSNET_MM_TASK:imagenet}}'
work_dir = 'work_dirs/clip-adapter_rn50_' + task.strip('/').split('/')[-1]
encoder = dict(model='RN50-quickgelu', pretrained='openai')
model = dict(backbone=encoder, head=dict(encoder=encoder))
cached = dict(dataset=dict(features=dict(encoder=encoder)))
train_dataloader = cached
test_dataloader = cached
if task != 'imagenet':  # which has no validation images
    val_dataloader = cached
few_shot = encoder
