# CLIP-Adapter, CLIP's ViT-B/16, ImageNet, 16 shots, on cached features.
_base_ = '_base_/clip-adapter_vit-b16.py'

task = dict(dataset='imagenet')
# The prompts are the seven of Tip-Adapter. ImageNet has no validation split of its own.
model = dict(head=dict(class_names='imagenet', prompts='imagenet_7'))
train_dataloader = dict(dataset=task)
val_dataloader = None
val_evaluator = None
val_cfg = None
test_dataloader = dict(dataset=task)
few_shot = dict(
    prompts='imagenet_7',
    selection='cv',
    # CoOp trains for 50 epochs on ImageNet, for any number of shots.
    overrides=dict(clip_adapter_released=dict(epochs=50)),
    **task,
)
