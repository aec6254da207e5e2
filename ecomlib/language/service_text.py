"""What the customers of a made-up shop ask, and what it answers. Written for this book: no real question is in it.

An entry is the name of an intent, its answer, and ten wordings, from close to the answer's words to far from them.
"""

from __future__ import annotations

from .templates import parse

SLOTS = {
    "item": (
        *("dress", "kettle", "jacket", "lamp", "backpack", "toaster", "blender", "rug", "sweater", "headphones"),
        *("curtains", "frying pan", "sandals", "coffee machine", "tent", "desk chair", "raincoat", "duvet"),
    ),
    "wear": ("dress", "jacket", "sweater", "boots", "sandals", "jeans", "shirt", "coat", "trainers", "skirt"),
    "when": ("last week", "on Monday", "yesterday", "two weeks ago", "on Friday", "this morning", "last month"),
    "place": ("Leeds", "Norway", "Dublin", "the islands", "Canada", "Berlin", "my village", "Malta"),
}
"""Words for the slots of the wordings."""

OPENERS = ("Hi, ", "Hello, ", "Hello there. ", "Good morning, ", "Quick question: ", "Sorry to bother you. ", "Hey ")
CLOSERS = (
    " Thanks!",
    " Thank you.",
    " Please help.",
    " Cheers",
    " Can someone answer today?",
    " Many thanks in advance.",
)

INTENTS = parse("""
# return_how
= To return an article, print the label from your account, stick it on the parcel and drop it at any post office.
How do I return the {item}? | What do I have to do to send the {item} back? | I want to return my {item}
the {item} is not for me, how does it travel back to you | Where do I print the paper for a parcel going back?
Is there a form for returning goods? | I changed my mind about the {item} and do not want to keep it
Need to give back a {item} I got {when} | Can your courier collect a {item} I no longer want?
Bought the wrong {item}, what are the steps to hand it back?
# return_window
= You have thirty days from the day of delivery to return an article.
How long can I return the {item}? | What is your return period? | Until when may I send back the {item} I got {when}?
Is it too late to return something from {when}? | How many days do I have to decide about the {item}?
I was ill and missed the deadline for sending back the {item} | Does the month for returns start with the order?
when does my right to give the {item} back end | The {item} has been here for weeks, would you still take it?
Is a present bought {when} still within the time limit for returns?
# refund_when
= Refunds are booked within five working days after your return has reached our warehouse.
When do I get my refund? | How long does a refund take? | I sent the {item} back {when} and have no money yet
still waiting to be paid back for the {item} | My return arrived {when}, where is my money?
You have had the {item} since {when} but nothing is on my account | What day will the refund be booked?
Has the amount for the {item} been transferred back to me? | How soon am I reimbursed?
The bank shows nothing from you although the {item} went back {when}
# refund_part
= If a refund is smaller than expected, a coupon or the original postage was deducted; the credit note lists it.
Why is my refund smaller than what I paid? | You refunded less than the price of the {item}
Part of the money for the {item} is missing | I got only some of my money back for the {item}
The credit note does not match the price of the {item} | Why was something deducted from my refund?
did you keep the postage when you paid me back | I paid more for the {item} than you returned to me
My coupon was taken off the amount I got back, is that right? | There is a gap between my payment and the refund
# exchange_size
= For another size, order the size you need in the exchange menu; we ship it before the first one is back.
Can I exchange the {wear} for a larger size? | The {wear} is too tight, can I swap it?
I need the {wear} one size smaller | How do I change the size of a {wear} I already have?
it pinches everywhere, I want the next one up | The {wear} I got {when} does not fit me
Can I get the same {wear} but bigger? | Would you trade the {wear} for one that is less wide?
Wrong size delivered by my own mistake, please switch the {wear} | The {wear} hangs loose on me, what can be done?
# size_guide
= The size chart under each picture gives chest, waist and inside leg in centimetres; between two, take the larger.
Which size of the {wear} should I take? | Do you have a size chart for the {wear}?
Does the {wear} come up small? | I am between two sizes, what do you advise for the {wear}?
How wide is the {wear} at the waist? | what are the measurements of a medium {wear}
I usually wear 40, what is that in your {wear}? | Is the {wear} a slim cut or a loose one?
How do I measure myself before ordering a {wear}? | Do your {wear} sizes match those of other shops?
# delivery_time
= Standard delivery takes two to four working days within the country and up to ten days abroad.
How long does delivery take? | When would the {item} arrive if I order today?
How many days do you need to ship to {place}? | Is the {item} going to be here before the weekend?
what is the usual waiting time for a parcel | Can I have the {item} in time for a birthday next week?
Do you deliver to {place} quickly? | How fast are you with a {item}?
If I buy a {item} now, on what day will I hold it? | What delivery times should I expect?
# track_order
= Follow your parcel with the tracking number in the dispatch mail, or under "My orders" in your account.
Where is my order? | How can I track my parcel? | I would like to know where the {item} is right now
Is there a tracking number for the {item}? | Has my {item} left the warehouse yet?
what is the status of the thing I bought {when} | Can I follow the van that brings the {item}?
Did you dispatch the {item} I ordered {when}? | The link to follow my parcel does not open
Please tell me how far my {item} has come
# late_delivery
= We are sorry for the delay. If a parcel is three days over its date, we send a new one or return your money.
My order is late | The {item} should have been here {when} | Your parcel has not come on the promised day
I have been waiting far too long for the {item} | The delivery date passed and there is no {item}
you said three days and it has been two weeks | Why is the {item} delayed?
Nothing arrived although it was due {when} | Still no {item}, this is taking forever
The {item} was announced for {when}, what went wrong?
# not_received
= If a parcel is marked as delivered and you do not have it, ask your neighbours; then we ask the carrier.
Tracking says delivered but I do not have the {item} | The parcel was handed over, but not to me
Somebody else must have taken my {item} | The carrier claims I signed for the {item}, I did not
my {item} was supposedly left at the door and the porch is empty | Delivered, it says, yet there is no {item}
I think the parcel with the {item} was stolen | The driver left the {item} with a neighbour I cannot find
The status is "delivered {when}" and I never saw a {item} | My mailbox has no card and the {item} is gone
# damaged
= Sorry that it broke. Send a photo of the damage and the box within a week; we replace the article at no cost.
The {item} arrived broken | My {item} was damaged on the way | There is a crack in the {item}
The box was crushed and so is the {item} | It came in pieces | The {item} I unpacked {when} is scratched all over
Your {item} leaks and the glass is shattered | I opened the carton and the {item} was smashed
what do you do about a dented {item} | Goods were harmed in transport, here are pictures
# wrong_item
= Our mistake: keep the wrong article until the courier collects it; the right one leaves the warehouse today.
You sent me the wrong article | I ordered a {item} and got something else | This is not the {item} I chose
The {item} has a different colour from the one I ordered | There is a stranger's order in my box
instead of a {item} there were towels in the parcel | You mixed up my order with someone else's
Inside was another model of the {item} | I received a {item} that I never asked for
What you packed is not what my confirmation says
# missing_part
= If a piece is missing from the box, name it and we post it to you free of charge; large orders come in several boxes.
A part of the {item} is missing | The screws for the {item} were not in the box | I paid for two and got one {item}
My order is incomplete | The manual and a cable are lacking | the lid is not there
Only one of the three things I bought was in the parcel | There is no charger with my {item}
I cannot put the {item} together because a piece is absent | Where is the rest of my order?
# cancel_order
= An order can be cancelled under "My orders" until it is packed; after that, refuse the parcel or return it.
How do I cancel my order? | Please cancel the {item} I ordered {when}
I do not want the {item} any more, stop the order
Can you withdraw my purchase? | I bought the {item} twice by accident, delete one
call off the shipment of the {item} before it goes out | I ordered by mistake a minute ago
Is it possible to undo an order for a {item}? | Please do not send the {item}
My child clicked on buy, how do I reverse that?
# change_address
= Until dispatch you can change the delivery address under "My orders"; after it, the carrier's site lets you redirect.
I need to change the delivery address | Can you send the {item} to another address?
I typed the wrong street for my order | We moved {when}, please deliver the {item} to the new flat
the house number on my order is not right | Can the {item} go to my office in {place} instead?
My parcel is heading for my old home | How do I correct where the {item} will be brought?
Please redirect the {item} to my parents | I forgot to update my postcode before buying the {item}
# pickup_point
= At checkout choose "parcel shop" and pick a collection point; parcels are kept there for seven days.
Can I collect the {item} from a shop? | Do you deliver to a parcel locker? | Is there a pick-up point in {place}?
Nobody is at home by day, where can I fetch the {item}? | I would rather pick the {item} up myself
how long do you hold a parcel at the counter | Which station near {place} keeps parcels for me?
Could I get the {item} from your store directly? | What do I bring along to collect my {item}?
Can a friend collect the {item} for me?
# shipping_cost
= Postage is 4.90 within the country and 14.90 abroad; it is free for orders above 50.
How much is shipping? | What does delivery to {place} cost? | Is postage free for a {item}?
From what amount do I pay no delivery fee? | Do you charge extra for sending a {item} to {place}?
what comes on top of the price for the post | Why are you asking for postage on my {item}?
How expensive is it to have a {item} brought here? | Are there charges for heavy parcels?
Can I avoid the delivery fee?
# express
= Express delivery on the next working day costs 9.90 if you order before two in the afternoon.
Do you offer express delivery? | I need the {item} tomorrow | Can the {item} be here overnight?
Is there a faster way to get the {item}, whatever it costs? | What is the price of next-day shipping?
it is urgent, could you rush my {item} | By what hour must I order so that the {item} comes the next day?
Can I upgrade my order to priority? | The party is tomorrow and I still have no {item}, can you hurry?
Is same-day delivery possible in {place}?
# pay_methods
= We accept credit card, bank transfer, PayPal and purchase on invoice.
How can I pay? | Which payment methods do you accept? | Can I pay for the {item} by bank transfer?
Do you take PayPal? | Is it possible to buy a {item} on invoice? | may I settle the {item} in cash at the door
Are foreign credit cards fine? | Can I use my debit card for the {item}?
What options are there at the till? | Do you work with Apple Pay or something like it?
# pay_failed
= If a payment is declined, check limit and card data and try again after ten minutes, or choose another method.
My payment was declined | The card does not go through | I cannot pay for the {item}, there is an error
Your checkout rejects my card | The transaction for the {item} failed three times
something breaks when I press pay | My bank says yes and you say no
The page hangs after I enter the card number | Why is my credit card refused?
I tried to buy a {item} and got an authorisation error
# double_charge
= A second charge is usually a reservation that disappears within three days; if it stays, send us the statement.
I was charged twice for the {item} | The amount for my order was taken two times
There are two payments on my statement | Why did you debit my account double?
one {item}, but the bank shows it twice | You booked the same sum again {when}
My card was billed more than once for a single {item} | Please give back the duplicate payment
I see an extra withdrawal from your shop | I only bought one {item} and paid for two
# instalments
= Orders above 100 can be paid in three, six or twelve monthly parts; choose "instalments" at checkout.
Can I pay for the {item} in instalments? | Do you offer monthly payments? | Can I spread the cost of a {item}?
Is there financing for the {item}? | I would like to pay a little each month
what interest do you take when I pay over a year | Can I pay half now and half later?
The {item} is too expensive to pay at once | How do I change the number of monthly rates?
Is it possible to buy the {item} on credit?
# invoice
= The invoice is in your account under "My orders" as a file to download; company details can be added there.
I need an invoice for the {item} | Where do I find the bill of my order? | Please send me a receipt for the {item}
My employer wants a document with the tax on it | How can I download the invoice from {when}?
could you put the company name on the bill | There was no paper about the price in the box
I require proof of purchase for the {item} | The tax number on my bill is not right
Can I have a copy of the receipt from {when}?
# coupon
= Enter the code in the field under the basket; one code an order, and it does not apply to reduced articles.
My discount code does not work | How do I use a coupon? | The voucher for the {item} is not accepted
I forgot to enter the promotion code | Where do I type in my ten percent?
your newsletter promised a rebate that I cannot redeem | Can I combine two codes for a {item}?
It says my code has expired, but it is from {when} | Is the coupon valid for a {item} on sale?
The price did not go down after I put in the code
# price_match
= If an article becomes cheaper within fourteen days of your order, we refund the difference on request.
The {item} is cheaper now than when I bought it | Do you match prices of other shops?
I saw the same {item} for less somewhere else | You lowered the price the day after I ordered
can I get the difference back, it went on sale {when} | Will the {item} be reduced soon?
A competitor sells that {item} for ten less | I paid full price {when} and today it is half
Is there a best-price guarantee on the {item}? | Price drop right after my purchase, what now?
# gift_card
= Gift cards come by mail, are worth 10 to 200, never expire, and their balance is shown in your account.
Do you sell gift cards? | How do I check what is left on my gift card? | Can I pay for the {item} with a gift card?
I want to give my sister some credit for your shop | Does a gift card run out?
the present card I was given does not scratch free | How do I top up a gift card?
Can I split a {item} between a gift card and my bank card? | My gift card number was lost
I would like to buy a voucher as a present
# gift_wrap
= Tick "gift" in the basket: for 3.50 we wrap the article, add your message and leave out the price.
Can you wrap the {item} as a present? | Do you offer gift wrapping? | Can I add a card with greetings?
The {item} is a surprise, please hide the price | Could the parcel have a ribbon?
it is for my mother, can it look festive | How much is nice paper around the {item}?
Please put a birthday message into the box | Can the {item} be sent straight to the birthday child without a bill?
I want the {item} packed prettily
# stock
= If an article is sold out, leave your mail address on its page and we write to you when it is back.
When will the {item} be back in stock? | Is the {item} available? | The {item} is sold out, will you get more?
Can you tell me once the {item} can be ordered again? | Do you still have the {item} in blue?
how many of the {item} are left | I would like to reserve a {item} that is not there now
Are you going to restock the {item}? | The page says the {item} is unavailable
Is the {item} gone for good?
# warranty
= Every article has a two-year warranty: describe the fault and we repair or replace it.
How long is the warranty on the {item}? | My {item} stopped working after a few months | Is the {item} under guarantee?
The {item} I bought last year died | Who repairs a {item} that fails?
it worked fine until {when} and now it does nothing | Does the guarantee cover a worn zip?
The motor of my {item} has given up | What if the {item} breaks after a year?
My {item} shows a fault that was not there at first
# care
= Care symbols are on the label and on the article's page; most textiles may be washed at thirty degrees.
How do I wash the {wear}? | Can the {wear} go into the dryer? | What is the best way to clean the {item}?
Will the {wear} shrink at sixty degrees? | Is the {item} dishwasher safe?
how do I get a stain out of the {wear} | May I iron the {wear}? | Which product keeps the {wear} soft?
Does the colour of the {wear} run? | The washing label has fallen off, what does it say?
# material
= Material, origin and test certificates are listed under "Details" on the page of every article.
What is the {wear} made of? | Is the {item} real leather? | Does the {wear} contain wool?
I am allergic to nickel, can I use the {item}? | Where is the {item} manufactured?
are there plastics in your {item} | Is the cotton of the {wear} organic?
Was an animal harmed for the {wear}? | What fabric is inside the {wear}?
Do you have a certificate for what the {item} contains?
# password
= Choose "forgotten password" at login; the mail with the link arrives within minutes, perhaps in the spam folder.
I forgot my password | How do I reset my password? | I cannot log in | The login does not accept me any longer
The mail for a new password does not come | my account is locked after three attempts
What do I do if I cannot remember my access data? | The reset link has expired
I am shut out of my profile | Your site says user name or password is wrong
# account_delete
= In your account, under "Privacy", you can delete the account and all data that the law lets us delete.
Please delete my account | How do I close my customer account? | I want all my data removed
Erase everything you know about me | I no longer want to be registered with you
take my name out of your database | Under data protection law I ask you to forget me
How can I get rid of my profile? | What do you store about me, and can it go?
I wish to terminate my membership for good
# newsletter
= Every newsletter has a link at its end to unsubscribe; it takes effect within a day.
How do I unsubscribe from the newsletter? | Stop sending me advertising | I get too many mails from you
I never asked for your newsletter | Take me off the mailing list | my inbox is full of your offers
How often do you write, and can it be less? | I want no more messages about sales
The link to leave the newsletter is dead | Can I have the newsletter only once a month?
# loyalty
= Each unit spent earns one point; a hundred points are worth five at the next order and are kept for two years.
How do I earn points? | What are my loyalty points worth? | My points for the {item} are missing
Can I pay with points? | How does your bonus programme work? | when do the points I have collected lapse
I bought a {item} and nothing was credited to my bonus account | What is the silver status good for?
Do I get points for a {item} that I return? | I would like to join the customer club
# contact
= Our people answer the telephone from eight to eight on working days, and the chat at any time.
How can I reach a human? | What is your phone number? | I want to talk to somebody
When is your hotline open? | Can I write to a real person? | stop the robot and give me an agent
Is there a person I can call about the {item}? | Your chat does not understand me
I wish to complain to a manager | At what hours do you pick up the phone?
# review
= You can rate an article under "My orders" two days after delivery; reviews are checked before they appear.
How do I write a review of the {item}? | Where can I rate the {item}? | My review has not appeared
I want to edit what I wrote about the {item} | Are the stars on your site from real buyers?
why did you take down my comment on the {item} | Can I leave feedback about the {item}?
I would like to tell others how good the {item} is | Who checks the opinions on your pages?
Do I get something for rating the {item}?
# business
= Companies can open a business account with net prices, payment within thirty days and bulk discounts.
Do you have prices for companies? | I need fifty of the {item}, is there a discount? | Can my firm open an account?
We are a school and want to order many {item} items | Do you sell wholesale?
quote for a large quantity please | Can we pay in thirty days as a company?
Is there a rebate when I take a hundred? | I am a reseller from {place}, who do I talk to?
How do I get net prices without the tax?
# recycle
= We take back old electrical devices and packaging free of charge: hand them to the driver or any of our counters.
Do you take back my old {item}? | How do I dispose of the packaging? | Where can I recycle the {item}?
Can the driver carry away the old machine? | What do I do with batteries that are empty?
is your packaging made of recycled paper | I have a broken {item} to throw away
Why do you use so much cardboard? | Do you collect used electrical things?
Which bin does the foil belong in?
# jobs
= Open positions are listed on our careers page; applications go through the form there.
Are you hiring? | I would like to work for you | Where do I send my application?
Do you have part-time jobs in {place}? | Can I do an internship with you?
is there an opening in your warehouse | I applied {when} and heard nothing
Do you train apprentices? | What do you pay your drivers? | Who handles applications in your company?
""")
"""Name -> (answer, wordings)."""
