# CLIP-Adapter, CLIP's RN50, Food101, 16 shots, on cached features.
_base_ = '_base_/clip-adapter_rn50.py'

task = dict(dataset='food101')
model = dict(head=dict(class_names='food101'))
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = dict(dataset=task)
few_shot = task
