_base_ = '_base_/clip-adapter_rn50.py'

task = dict(dataset='oxford_flowers')
model = dict(head=dict(class_names='oxford_flowers'))
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = dict(dataset=task)
few_shot = task
