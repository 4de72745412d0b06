from marketsync.errors import MarketSyncError as MarketSyncError
from storage.following import follow as follow
from storage.reader import open_reader as _open_reader
from tasks.public import copy as copy
from tasks.public import estimate as estimate
from tasks.public import explain as explain
from tasks.public import export as export
from tasks.public import query as query
from tasks.public import read_report as read_report
from tasks.public import status as status
from tasks.public import stores as stores
from tasks.public import sync as sync

open_store = _open_reader
