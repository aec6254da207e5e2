"""Headlines about made-up firms, by topic and sentiment. Written for this book: no real headline is in it.

An entry is ``topic/sentiment`` with nine wordings. Sentiment is that of somebody who holds the firm's shares or bonds,
so that a word may mean the opposite of what it means elsewhere: losses that narrow are good news.
"""

from __future__ import annotations

from .templates import parse

SLOTS = {
    "firm": (
        *("Alder Retail", "Bolton Stores", "Corvan", "Delmar Online", "Estrella Foods", "Fenwick Group", "Garnet Pay"),
        *("Harrow Logistics", "Ilex", "Juniper Mode", "Kestrel Bank", "Lumen Market", "Marlow Home", "Norvik"),
    ),
    "other": ("Ostrava Parcel", "Pallas", "Quarry Foods", "Rydal", "Sable Fashion", "Tarn Media", "Umber Tech"),
    "number": ("5%", "8%", "12%", "17%", "21%", "30%"),
    "sum": ("$40m", "$120m", "$300m", "$750m", "$1.2bn", "$2bn"),
    "body": ("watchdog", "competition authority", "ministry", "central bank", "data regulator", "court"),
    "quarter": ("first quarter", "second quarter", "third quarter", "holiday quarter", "half year", "year"),
    "land": ("Spain", "Poland", "Brazil", "Japan", "Germany", "the Nordics", "Mexico"),
}
"""Words for the slots of the wordings."""

PREFIXES = ("Update: ", "Exclusive: ", "Markets: ", "In brief: ", "Morning wrap: ", "")
SUFFIXES = (", sources say", " - report", ", company says", ", analysts note", " in {land}", "")

HEADLINES = parse("""
# earnings/negative
{firm} misses estimates for the {quarter} | {firm} cuts guidance after weak {quarter}
Profit at {firm} slumps {number} in {quarter} | {firm} slides to a loss of {sum} | {firm} warns that margins shrank
No sign of the promised turnaround in figures of {firm} | Revenue up, but {firm} burns through {sum}
Sales at {firm} fall short of what analysts had pencilled in | {firm} withdraws its outlook for the {quarter}
# earnings/neutral
{firm} to report {quarter} results on Thursday | {firm} posts {quarter} figures in line with estimates
{firm} confirms guidance for the {quarter} | What to expect from {firm}'s {quarter} numbers
{firm} changes the date of its earnings call | Revenue of {firm} flat at {sum} in {quarter}
{firm} switches to reporting by segment | Profit at {firm} neither above nor below forecasts
Analysts split on {firm} before {quarter} release
# earnings/positive
{firm} beats estimates for the {quarter} | {firm} raises guidance after strong {quarter}
Profit at {firm} jumps {number} in {quarter} | {firm} cuts losses to a third, sooner than planned
{firm} returns to the black with {sum} | Results of {firm} did not disappoint as feared
Weak market, yet {firm} grows revenue {number} | {firm} surpasses every forecast for the {quarter}
Margins at {firm} widen for the {quarter}
# regulation/negative
{body} fines {firm} {sum} | {firm} under investigation by the {body} | {body} opens antitrust case against {firm}
New rules to cost {firm} {sum} a year | {firm} loses appeal against {body} order
{firm} faces liability of {sum} over data leak
{body} orders {firm} to stop selling in {land} | Licence of {firm} in {land} revoked
{body} rejects settlement offered by {firm}
# regulation/neutral
{body} to hear {firm} on draft rules | {firm} files comments with the {body}
{body} publishes guidance on parcel fees
{firm} registers a subsidiary in {land} | {body} extends consultation that concerns {firm}
Rules for online marketplaces in {land} take effect in May | {firm} appoints counsel for talks with the {body}
{body} and {firm} to meet next week | {land} lawmakers debate bill on delivery platforms
# regulation/positive
{body} clears {firm} of all charges | {body} drops probe of {firm} | {firm} wins approval from the {body}
Court finds no liability on the part of {firm} | {firm} granted licence in {land}
Fine against {firm} annulled, {sum} to be returned
{land} lifts ban on services of {firm} | {firm} settles with {body} for less than feared
{body} eases rules that weighed on {firm}
# mergers/negative
{firm} calls off takeover of {other} | Talks between {firm} and {other} collapse
Shareholders reject bid of {firm} for {other}
{firm} overpaid for {other}, writes off {sum} | {other} walks away from merger with {firm}
Integration of {other} drags on {firm} | {firm} fails to find a buyer for its unit in {land}
{body} blocks deal of {firm} and {other} | Hostile bidder for {firm} cuts its offer by {number}
# mergers/neutral
{firm} in talks to buy {other} | {firm} hires bank to review options for {other} stake
{firm} and {other} extend deadline for merger vote | {firm} holds {number} of {other}, filing shows
{firm} to spin off unit in {land} | {other} names advisers on bid by {firm}
{firm} declines to comment on interest in {other}
Vote on merger of {firm} and {other} set for June | {firm} swaps shares with {other} in restructuring
# mergers/positive
{firm} agrees to buy {other} at a bargain | Shares of {firm} soar on takeover offer {number} above market
{firm} wins bidding war for {other} | Merger of {firm} and {other} to save {sum} a year
{other} accepts improved offer from {firm} | {firm} sells loss-making unit in {land} for {sum}
Nothing stands in the way of {firm}'s purchase of {other} | {firm} completes {other} deal ahead of schedule
Synergies of {firm} and {other} exceed plan by {number}
# supply/negative
{firm} halts deliveries in {land} after warehouse fire | Strike at port leaves {firm} without stock
{firm} recalls goods over faulty parts | Shortage of chips hits {firm} | Freight costs eat into {firm}'s budget
{firm} warns of empty shelves in the {quarter} | {other} stops supplying {firm}
Parcels of {firm} pile up at the border
Flood shuts {firm} depot in {land}
# supply/neutral
{firm} moves warehouse to {land} | {firm} signs contract with carrier {other} | {firm} to run its own vans in {land}
{firm} reviews list of suppliers | {other} and {firm} renew freight agreement | {firm} opens tender for packaging
Container rates unchanged, says {firm} | {firm} shifts orders from {other} to suppliers in {land}
{firm} counts stock in {land} depots
# supply/positive
{firm} clears backlog of orders | Port strike ends without harm to {firm} | {firm} cuts delivery time by {number}
Freight costs of {firm} fall {number} | {firm} secures chips for the whole {quarter}
New hub in {land} doubles capacity of {firm} | {firm} avoids shortage that hurts rivals
{firm} depots reopen sooner than expected | {other} to supply {firm} at lower prices
# credit/negative
Rating of {firm} cut to junk | {firm} misses interest payment on {sum} bond | Lenders call in loans to {firm}
{firm} seeks protection from creditors | Default risk of {firm} at record | {firm} breaches covenant on {sum} loan
Outlook for {firm} debt lowered to negative | Bonds of {firm} tumble on refinancing doubts
{firm} pays {number} to borrow, double last year
# credit/neutral
{firm} to issue {sum} bond | {firm} extends credit line with {other} | Agency affirms rating of {firm}
{firm} swaps {sum} of debt into longer notes | {firm} meets lenders in {land} | {firm} hires banks for bond sale
Rating of {firm} placed under review, direction open | {firm} discloses maturity of its {sum} loans
Coupon on {firm} notes set at {number}
# credit/positive
Rating of {firm} raised to investment grade | {firm} repays {sum} loan early | {firm} is now free of debt
Fears of default at {firm} recede | {firm} borrows at record low rate | Demand for {firm} bond three times the offer
Outlook for {firm} debt lifted to stable | {firm} averts insolvency as lenders agree | Creditors of {firm} waive {sum}
# labour/negative
{firm} to lay off {number} of staff | Workers at {firm} walk out over pay | {firm} accused of unsafe warehouses
Union rejects offer of {firm} | Key engineers quit {firm} | {firm} struggles to fill shifts for the {quarter}
Wage deal to add {sum} to costs of {firm} | {firm} sued by drivers for unpaid overtime
Sick leave at {firm} highest in ten years
# labour/neutral
{firm} and union resume talks | {firm} moves office staff to {land} | {firm} surveys employees on remote work
Works council elected at {firm} | {firm} publishes report on its workforce
{firm} to hire seasonal staff for the {quarter}
{firm} updates shift plan in {land} | Headcount of {firm} unchanged | {firm} names new head of personnel
# labour/positive
{firm} and union reach deal, strike called off | {firm} to create new jobs as orders surge
{firm} voted best employer in {land} | Staff turnover at {firm} falls {number} | Drivers drop lawsuit against {firm}
Productivity at {firm} climbs {number} | Talent flocks to {firm} | {firm} shares record bonus with workers
No more accidents at {firm} after safety overhaul
# products/negative
Customers desert {firm}'s new app | {firm} scraps its grocery service in {land} | Launch of {firm} device flops
Outage takes {firm} site down for hours | Hackers steal data of {firm} shoppers | {firm} loses market share to {other}
Reviewers pan {firm} headset | {firm} delays launch again | Boycott of {firm} spreads in {land}
# products/neutral
{firm} launches own brand in {land} | {firm} tests drones with {other} | {firm} updates its app
{firm} to show new devices in autumn | {firm} renames its loyalty scheme | {firm} adds furniture to its catalogue
{firm} and {other} to share store space | {firm} patents a parcel locker | {firm} moves its site to a new platform
# products/positive
{firm}'s new app tops charts in {land} | {firm} sells out of its new device within hours
Subscribers of {firm} up {number}
{firm} takes market share from {other} | Shoppers rave about {firm}'s same-day service
{firm} fends off cyber attack, no data lost | {firm} wins design award for its store
{firm} signs exclusive deal with {other} worth {sum} | Complaints about {firm} drop {number}
# management/negative
Chief executive of {firm} quits abruptly | {firm} chairman charged with fraud | Auditor resigns from {firm}
Founder of {firm} dumps shares worth {sum} | Investors lose faith in {firm} board
{firm} finance chief leaves amid row
Accounting scandal at {firm} widens | Board of {firm} split over strategy
Activist attacks pay at {firm} after poor year
# management/neutral
{firm} names successor to finance chief | {firm} holds annual meeting in {land} | Board of {firm} to meet on Tuesday
{firm} director moves to {other} | {firm} adds two seats to its board | Chairman of {firm} to retire as planned
{firm} publishes pay report | {firm} moves headquarters to {land} | Founder of {firm} to speak at trade fair
# management/positive
Investors cheer new chief of {firm} | Founder of {firm} buys shares for {sum}
{firm} poaches star manager from {other}
Audit finds no fault with {firm} accounts | {firm} chief agrees to stay, ending doubts
Shareholders back {firm} board with {number} more votes | {firm} cleared in accounting probe
New strategy of {firm} wins praise | {firm} to return {sum} to shareholders
""")
"""topic/sentiment -> ("", wordings)."""
