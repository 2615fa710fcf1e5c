# CLIP-Adapter, CLIP's RN50, FGVCAircraft, 16 shots, on cached features.
_base_ = '_base_/clip-adapter_rn50.py'

task = dict(dataset='fgvc_aircraft')
model = dict(head=dict(class_names='fgvc_aircraft'))
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = dict(dataset=task)
few_shot = task
